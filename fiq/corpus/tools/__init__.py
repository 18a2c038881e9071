"""Tools over whole files of the corpus: verify, repack, copy."""
