"""Dead letters: their listing, their replay, and requests that the server delivers no more."""
