"""Turns a Hugging Face encoder and Lightning regression heads into a bundle; the only package that needs torch."""
