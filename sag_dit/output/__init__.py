"""What a run leaves behind: images, their manifest, and the page that shows them."""
