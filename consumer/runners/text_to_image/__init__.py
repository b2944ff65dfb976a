"""Images from texts: any pipeline of diffusers."""
