"""Device meshes and what is reduced over them."""
