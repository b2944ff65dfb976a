"""The one sentence that describes a scene, and the phrases that it is made of."""

from consumer.runners.demonstration.training.scenes import Scene, Thing


def description(scene: Scene) -> str:
    """The one sentence that describes a scene: of two things, the left or upper one first."""
    if scene.relation in {"right of", "below"}:
        scene = scene.turned
    background = f"on {a(scene.background)} background"
    if len(scene.things) == 1:
        return f"{named(scene.things[0]).capitalize()} {background} {place_words(scene.place)}."
    first, second = scene.things
    return f"{named(first).capitalize()} {scene.relation} {named(second)} {background}."


def place_words(place: str) -> str:
    """Where something is, for example `in the top left corner`."""
    if place == "center":
        return "in the center"
    if " " in place:
        return f"in the {place} corner"
    return f"at the {place}" if place in {"top", "bottom"} else f"on the {place}"


def named(thing: Thing) -> str:
    """For example `a small red star`; a medium size goes without saying."""
    size = "" if thing.size == "medium" else f"{thing.size} "
    return a(f"{size}{thing.colour} {thing.shape}")


def a(words: str) -> str:
    """The words with their article."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"
