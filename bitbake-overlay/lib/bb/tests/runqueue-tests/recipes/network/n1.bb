inherit network
