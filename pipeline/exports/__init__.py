"""Mined clips in the forms that trainers read, one file a form; `core` writes them all the same way."""
