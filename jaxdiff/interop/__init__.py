"""Published weights in and out: files of tensors, mappings of names, workdirs."""
