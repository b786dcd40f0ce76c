"""CPU fast paths, behind one seam."""
