"""Fast paths of the networks, mostly for CPUs; `dispatch` switches them off."""
