"""At which level each model is, and bringing what is only upstream (docs/native-api.md)."""
