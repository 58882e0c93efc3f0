"""Many runs: trained here or on a cluster, watched, and summed up."""
