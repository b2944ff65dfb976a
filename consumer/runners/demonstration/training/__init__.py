"""How the demonstration models were made, and how to make them again."""
