"""Device meshes and the table that lays parameters and batches over them."""
