"""Templates of model cards; the wheel ships them as zoo.hub_cards."""
