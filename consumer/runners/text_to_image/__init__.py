"""Pictures from texts: any pipeline of diffusers."""
