"""Content from elsewhere, under the identities it has there: other registries and bundles."""
