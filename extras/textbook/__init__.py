""""Textbooks Are All You Need" in miniature."""
