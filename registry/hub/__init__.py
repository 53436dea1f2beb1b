"""The Hugging Face Hub's read API over what the registry holds (docs/hub-api.md)."""
