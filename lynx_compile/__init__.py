"""lynx-compile: `torch.compile(model, backend="rt_lynx")`."""
