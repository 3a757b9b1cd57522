"""HDF5 structures, as every Keras writer lays them out, read with bounds and without libhdf5."""
