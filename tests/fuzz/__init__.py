"""Random and hostile input; `make fuzz` runs many more examples."""
