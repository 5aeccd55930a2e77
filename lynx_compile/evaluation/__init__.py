"""How far a method moves the pictures: metrics, weight-sparsity rivals, the table."""
