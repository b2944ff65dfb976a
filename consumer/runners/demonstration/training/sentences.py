"""The sentence that describes a scene, and its phrases."""

from consumer.runners.demonstration.training.scenes import Scene, Thing


def description(scene: Scene) -> str:
    """Return the sentence that describes a scene, with the left or upper thing first."""
    if scene.relation in {"right of", "below"}:
        scene = scene.turned
    background = f"on {a(scene.background)} background"
    if len(scene.things) == 1:
        return f"{named(scene.things[0]).capitalize()} {background} {place_words(scene.place)}."
    first, second = scene.things
    return f"{named(first).capitalize()} {scene.relation} {named(second)} {background}."


def place_words(place: str) -> str:
    """Return the phrase for a place, for example `in the top left corner`."""
    if place == "center":
        return "in the center"
    if " " in place:
        return f"in the {place} corner"
    return f"at the {place}" if place in {"top", "bottom"} else f"on the {place}"


def named(thing: Thing) -> str:
    """Return the phrase for a thing, for example `a small red star`, without a medium size."""
    size = "" if thing.size == "medium" else f"{thing.size} "
    return a(f"{size}{thing.colour} {thing.shape}")


def a(words: str) -> str:
    """Return the words with their indefinite article."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"
