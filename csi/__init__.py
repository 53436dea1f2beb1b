"""The CSI driver (docs/csi.md): a model is a volume of a pod."""
