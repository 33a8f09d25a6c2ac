"""Code that knows nothing about relations: compatibility, files, images, environment."""
