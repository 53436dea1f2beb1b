"""What may become visible: formats, pickled files, signatures (docs/registry-admission.md)."""
