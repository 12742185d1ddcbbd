"""Capture of every input form, the program as the analyses see it, calls by argument name, plans and edits."""
