"""What several test files share: reference computations, small models, ways to run engines."""
