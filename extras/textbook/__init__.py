""""Textbooks Are All You Need" in small."""
