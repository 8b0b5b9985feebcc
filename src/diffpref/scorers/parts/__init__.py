"""What several scorers are made of: weights, pixels, texts, networks. No scorer is named here."""
