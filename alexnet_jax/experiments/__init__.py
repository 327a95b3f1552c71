"""Many runs: aggregated, compared, searched, reported."""
