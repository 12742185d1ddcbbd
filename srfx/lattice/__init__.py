"""Pure values of the analyses: channel labels and classes, constancy.  No torch.fx here."""
