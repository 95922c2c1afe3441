"""A run begun, resumed, rewound, branched, exported."""
