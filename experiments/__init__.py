"""The experiments behind the README: each file asks one question."""
