"""Test helpers that ship with the product: real servers and small artefacts."""
