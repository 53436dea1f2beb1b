"""A model loader for inference engines: tensors of a model's safetensors files, read in parallel, ahead of the engine.

    with open_folder(place) as folder:
        for name, tensor in load_tensors(folder, settings):
            ...

- ``folders``: where a model's files come from: a plain directory (``sources``), one of a mount of ours (``mounted``,
  ``filling``), or the client of a registry;
- ``shards``: which files and tensors a model has, checked before anything is read, and the ranges to read;
- ``pipeline``: which range is read when, by which threads; knows nothing of files, tensors or devices;
- ``memory``: where a range's bytes go: mapped, into host memory, or through ``staging`` to a device (``cuda``);
- ``engine``: vLLM's loader on all that; ``plugin``: what vLLM loads.

docs/loader.md is the guide.
"""
