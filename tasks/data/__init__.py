"""Corpora, tokenizers and haystacks."""
