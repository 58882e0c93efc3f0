"""A trained model on a text: numbers, figures, a page. What draws is imported here only."""
