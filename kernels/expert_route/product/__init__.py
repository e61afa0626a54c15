"""What comes before the choice where there are few tokens: the router's product, cut into pieces for many programs."""
