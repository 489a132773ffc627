"""Model types: their attention layouts, tensor names, configs and stock classes. Nothing here converts."""
