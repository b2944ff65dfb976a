"""Dead letters: their listing, their replay, and requests that have reached `max_deliver`."""
