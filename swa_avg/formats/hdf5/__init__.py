"""Read HDF5 as Keras writes it: bounded, and without libhdf5 wherever possible."""
