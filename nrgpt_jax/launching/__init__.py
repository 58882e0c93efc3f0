"""Starting the training program elsewhere: what to write and what to call, one module a place."""
