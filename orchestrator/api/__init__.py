"""The resources that people write: what they hold, what is refused, and how their schemas are made of it."""
