"""Kubernetes' API for those who list and watch: kinds, what lists and watches say, and who follows them."""
