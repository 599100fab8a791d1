"""The mutation score: faults planted into good artifacts by a planter that knows nothing of lconvert."""
