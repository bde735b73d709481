"""Reading and writing the files of a training set."""
