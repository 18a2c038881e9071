"""Backups of a live corpus: how one is made, what its manifest says, how it is put back."""
