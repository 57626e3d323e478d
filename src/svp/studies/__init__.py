"""Many runs: tables over methods and seeds."""
