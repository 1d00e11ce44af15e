#include <gtest/gtest.h>
TEST(x,x){}
