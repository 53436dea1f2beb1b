"""A bounded store on a fast local disk in front of one in the cloud (docs/registry-stores.md)."""
