"""Analysis of a model on a text: numbers, figures, a page. Only this package imports plotting."""
